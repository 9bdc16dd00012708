"""Models as files on the way to a bundle: exported, quantised, checked against torch, and what their stages leave behind."""
