"""An HTTP server with OpenAI's API: several conversations share one model."""
