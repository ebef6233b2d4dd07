"""Scripts that end in a picture, and the gallery that they share."""
