"""Where metrics and models go."""
