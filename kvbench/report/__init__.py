"""From records to tables and figures; nothing here runs a model."""
