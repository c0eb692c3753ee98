"""What the servers share: pages that run nothing but their own script, answers in one form, a port, a way to stop."""
