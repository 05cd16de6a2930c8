"""What is measured: one module a task, each from vectors to scores with their protocol."""
