"""What a checkpoint is worth: k-NN and linear probe on frozen features."""
