"""What a model is trained to do: from token rows to inputs, labels and a loss."""
