"""Applications of a trained model: generating text, chat, and evaluating how well it predicts a text."""
