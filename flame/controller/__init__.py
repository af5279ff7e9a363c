"""What happens next: the life of jobs and tasks."""
