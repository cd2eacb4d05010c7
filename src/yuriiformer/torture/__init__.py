"""The proof that nothing is lost: runs are killed, their files damaged, their disk refuses, and they end all the same."""
