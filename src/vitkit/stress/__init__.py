"""What a model does when the input turns against it: attacks, robustness, rejection of doubtful answers."""
