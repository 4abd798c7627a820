"""What a trained model is used for: generating text, chat, and how well it predicts a text."""
