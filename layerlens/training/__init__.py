"""What makes checkpoints: run configurations, objectives, the training loop."""
