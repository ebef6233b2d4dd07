"""From phrases and pictures to boxes and masks; `objectcompose.grounding.grounder` is where to start."""
