"""Any DVC project in Dagster: dvc.yaml -> assets, reports -> checks, dvc.lock -> event log.

Documented in docs/dagster-dvc.md.

It has no stage's name and nothing of Pedigree's layout;
`orchestration/dagster/` adds those by the hooks of `DvcProject`.
"""
