"""What a trained network looks like: similarity between layers, geometry of embeddings, regions."""
