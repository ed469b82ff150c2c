"""`tlora eval`: its configuration, folder and models, and how it queries them."""
