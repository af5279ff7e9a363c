"""Flame: compose, deploy and manage federated learning jobs. See README.md and docs/architecture.md."""
