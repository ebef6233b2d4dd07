"""The pipelines, and the steps, checks and plots that they share."""
