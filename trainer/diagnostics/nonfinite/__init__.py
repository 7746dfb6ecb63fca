"""Non-finite steps: rerun the batch of a skipped step, find the cause, and write a report."""
