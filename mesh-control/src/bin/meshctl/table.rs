//! One view, printed as aligned tables, JSON or YAML.

use std::io::Write as _;

use clap::ValueEnum;
use serde_json::Value;

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

/// What is shown: the whole as data, and tables for people.
pub(crate) struct View {
    pub(crate) data: Value,
    pub(crate) tables: Vec<Table>,
}

impl View {
    /// # Errors
    /// When the output cannot be written; a reader that closed its pipe has read enough.
    pub(crate) fn print(&self, format: Format) -> anyhow::Result<()> {
        let text = match format {
            Format::Table => self.tables.iter().map(Table::render).collect::<Vec<_>>().join("\n"),
            Format::Json => serde_json::to_string_pretty(&self.data)? + "\n",
            Format::Yaml => serde_norway::to_string(&self.data)?,
        };
        match std::io::stdout().write_all(text.as_bytes()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }
}

/// Rows under a heading; columns are as wide as their widest cell.
pub(crate) struct Table {
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(columns: &[&'static str]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn render(&self) -> String {
        let heading: Vec<String> = self.columns.iter().map(|column| (*column).to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&heading).chain(&self.rows).collect();
        let width = |i: usize| {
            lines.iter().filter_map(|line| line.get(i)).map(|cell| shown(cell).chars().count()).max()
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(|i| width(i).unwrap_or(0)).collect();
        let mut text = String::new();
        for line in lines {
            let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{:width$}", shown(cell)));
            text.push_str(cells.collect::<Vec<_>>().join("   ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// An empty cell is shown as a dash. Control characters would break the table, or steer the terminal.
fn shown(cell: &str) -> String {
    if cell.is_empty() { "-".to_owned() } else { cell.replace(char::is_control, " ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let mut table = Table::new(&["NAME", "PORT"]);
        table.row(["a-long-name".to_owned(), "80".to_owned()]);
        table.row(["b".to_owned(), String::new()]);
        assert_eq!(table.render(), "NAME          PORT\na-long-name   80\nb             -\n");
    }
}
