"""The pipelines, one story each, and the steps, checks and plots that they share."""
