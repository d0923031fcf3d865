"""What is done to a layer, or to the input, while a network trains."""
