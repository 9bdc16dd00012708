"""From a request to a verified bundle and a report: what was asked for is resolved, then run stage by stage in a run folder."""
