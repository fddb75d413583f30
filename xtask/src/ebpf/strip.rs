//! Takes the compiler's debug information out of the kernel object: four fifths of it, which the agent would carry along in
//! memory. BTF, which is made of it, stays.

use anyhow::{Context, Result};
use object::build::elf::{Builder, SectionData};
use object::elf;

pub(super) fn strip(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("the linker's output is no ELF file")?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete = [&b".debug"[..], b".rel.debug"].iter().any(|prefix| name.starts_with(prefix));
    }
    builder.delete_orphans();
    // The linker keeps names of sections among those of symbols; the writer wants them apart.
    let names = builder.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("cannot write the kernel object without debug information")?;
    Ok(stripped)
}
