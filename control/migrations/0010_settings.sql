-- What somebody has said of a group: how it is balanced, how fast its experts move.
CREATE TABLE settings (
    group_name TEXT NOT NULL,
    -- 'balancing' or 'pace'.
    kind TEXT NOT NULL,
    -- JSON, control's Balancing or Pace.
    value TEXT NOT NULL,
    PRIMARY KEY (group_name, kind)
) STRICT;
INSERT INTO settings (group_name, kind, value) SELECT group_name, 'balancing', balancing FROM balancing;
DROP TABLE balancing;
