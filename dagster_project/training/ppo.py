from dagster_project.params import Section


class Settings(Section):
    """stub while building"""
