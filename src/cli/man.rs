//! `belay man`: manual pages.
//!
//! Guarantees: `belay` and each of its commands have a page that says the same as `--help`.
//!
//! Non-goals: installing the pages.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Command;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use super::CliError;

/// Print the manual page, or write the pages of all commands
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay man | man -l -
      Read the page.
  belay man --out ~/.local/share/man/man1
      Install the page and one page for each command: `man belay`, `man belay-run`. For all users: /usr/local/share/man/man1.")]
pub(super) struct Args {
    /// Folder for the pages of `belay` and of each command. It is created if it does not exist
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Writes the pages.
pub(super) fn run(args: &Args, command: Command, out: &mut dyn Write) -> Result<u8, CliError> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    match &args.out {
        None => write_page(&command, out)?,
        Some(folder) => {
            fs::create_dir_all(folder).and_then(|()| write_all(&command, folder)).map_err(|e| {
                CliError::new(format!("--out: cannot write to {}: {e}; name a folder of yours", folder.display()))
            })?;
        }
    }
    Ok(0)
}

fn write_all(command: &Command, folder: &Path) -> io::Result<()> {
    let mut page = Vec::new();
    write_page(command, &mut page)?;
    fs::write(folder.join(format!("{}.1", name(command))), page)?;
    command.get_subcommands().filter(|one| !one.is_hide_set()).try_for_each(|one| write_all(one, folder))
}

/// Returns the name of the page: `belay-run` for `belay run`.
fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

fn write_page(command: &Command, out: &mut dyn Write) -> io::Result<()> {
    let mut page = Vec::new();
    render(command, &mut page)?;
    // Write ASCII, which every troff reads.
    let page = String::from_utf8_lossy(&page);
    let ascii = |c: char| if c.is_ascii() { c.to_string() } else { format!("\\[u{:04X}]", u32::from(c)) };
    out.write_all(page.chars().map(ascii).collect::<String>().as_bytes())
}

fn render(command: &Command, out: &mut dyn Write) -> io::Result<()> {
    let source = format!("belay {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(source).manual("Belay");
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    if command.has_subcommands() {
        man.render_subcommands_section(out)?;
    }
    let mut roff = Roff::default();
    if let Some(more) = command.get_after_long_help() {
        sections(&more.to_string(), &mut roff);
    }
    if let Some((above, _)) = name(command).rsplit_once('-') {
        roff.control("SH", ["SEE ALSO"]);
        roff.text([bold(above), roman("(1)")]);
    }
    roff.to_writer(out)
}

/// Writes the text below a line such as `Examples:` as a section, in which indented lines stay as they are.
fn sections(text: &str, roff: &mut Roff) {
    let mut filled = true;
    for line in text.lines() {
        let indented = line.starts_with(' ');
        if indented && filled {
            roff.control("nf", []);
        } else if !indented && !filled {
            roff.control("fi", []);
        }
        filled = !indented;
        match line.strip_suffix(':') {
            Some(heading) if !indented => roff.control("SH", [heading.to_uppercase().as_str()]),
            _ if line.is_empty() => roff.control("PP", []),
            _ => roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]),
        };
    }
    if !filled {
        roff.control("fi", []);
    }
}
