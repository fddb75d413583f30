//! What tells a file that is whole from one that is not.

/// CRC-32 as in IEEE 802.3.
pub(super) struct Crc(u32);

impl Crc {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            let mut value = at as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
                bit += 1;
            }
            table[at] = value;
            at += 1;
        }
        table
    };

    pub(super) fn new() -> Self {
        Self(u32::MAX)
    }

    pub(super) fn of(bytes: &[u8]) -> u32 {
        let mut crc = Self::new();
        crc.update(bytes);
        crc.value()
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let low = (self.0 as u8) ^ byte;
            self.0 = Self::TABLE[usize::from(low)] ^ (self.0 >> 8);
        }
    }

    pub(super) fn value(&self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(Crc::of(b"123456789"), 0xcbf4_3926);
    }
}
