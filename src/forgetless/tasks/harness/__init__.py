"""The lm-evaluation-harness: its tasks found, given local data, run, and their scores read."""
