"""What a model is for: its inputs, data, loss and metric."""
