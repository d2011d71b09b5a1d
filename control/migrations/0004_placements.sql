-- Committed placements: immutable, numbered by layer.
CREATE TABLE placements (
    group_name TEXT NOT NULL,
    -- Digest of the group's model.
    model TEXT NOT NULL,
    layer INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    -- JSON, protocol::placement::Placement.
    placement TEXT NOT NULL,
    -- What it comes from: 'default', or 'file'.
    source TEXT NOT NULL,
    -- SHA-256 of the file.
    file_digest TEXT,
    -- Milliseconds since 1970.
    made_ms INTEGER NOT NULL,
    PRIMARY KEY (group_name, model, layer, epoch)
) STRICT;
