"""A plan for people: text, tables, one offline HTML page. No torch."""
