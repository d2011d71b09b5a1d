-- Until when a proposal may be approved, in milliseconds since 1970.
ALTER TABLE proposals ADD COLUMN expires_ms INTEGER NOT NULL DEFAULT 0;
-- JSON, control's Decision; null while nobody has decided.
ALTER TABLE proposals ADD COLUMN decision TEXT;
-- The proposal that a placement was made by; its source is 'proposal' then.
ALTER TABLE placements ADD COLUMN proposal TEXT;
