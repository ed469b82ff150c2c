"""`tlora chat`: chat with a trained model."""
