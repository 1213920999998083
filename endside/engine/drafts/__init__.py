"""Sources of drafts: each makes a `Drafter` (endside.engine.draft) for every sequence."""
