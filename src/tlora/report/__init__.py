"""Pictures and tables of what tlora decided and measured."""
