"""What runs at the server, and the experiments: ServerApp, engines, command line, report."""
