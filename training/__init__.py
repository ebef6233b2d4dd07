"""Training scripts on accelerate and what they share."""
