"""`tlora chat`: talk to what was trained."""
