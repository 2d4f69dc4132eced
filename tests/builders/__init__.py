"""Sample rows, files, projects and trainings that several test modules use. A
test module imports from here or from conftest only."""
