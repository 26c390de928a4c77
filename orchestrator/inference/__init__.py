"""Text from a trained model, on one device: sampling from a model, and generating from a checkpoint."""
