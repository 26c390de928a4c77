"""What happens between the steps of a run: saving, evaluation, and stopping on a signal."""
