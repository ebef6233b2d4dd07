"""What trains: adapters hold weights and turn conditions into tensors for the attention core."""
