"""From records to tables, statistics, figures, pages and exports."""
