"""What puts rules into a firewall."""
