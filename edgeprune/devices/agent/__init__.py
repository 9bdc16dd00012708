"""devices/agent."""
