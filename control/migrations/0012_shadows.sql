-- What plans of policies would have been worth in the window that came next.
CREATE TABLE scores (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    group_name TEXT NOT NULL,
    end_ms INTEGER NOT NULL,
    -- As it is asked for; empty for what was in force.
    policy TEXT NOT NULL,
    settings TEXT NOT NULL,
    budget TEXT NOT NULL,
    -- Of the version that answered; empty for what was in force.
    digest TEXT NOT NULL,
    -- Rows of the busiest rank beside the mean, over layers: mean and worst. Null where there was no plan.
    max_over_mean REAL,
    worst REAL,
    moved INTEGER NOT NULL,
    fuel INTEGER NOT NULL,
    elapsed_us INTEGER NOT NULL,
    -- Why there was no plan.
    problem TEXT,
    UNIQUE (group_name, end_ms, policy, settings, budget, digest)
) STRICT;
