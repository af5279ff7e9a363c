"""What is done to an update before it leaves."""
