"""What only the report needs: rows, tables, figures, claims, and the export to HTML and PDF."""
