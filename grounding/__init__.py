"""From phrases and pictures to boxes and masks."""
