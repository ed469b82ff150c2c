"""`tlora compare`: its configuration, folder, trials and the queue that runs them."""
