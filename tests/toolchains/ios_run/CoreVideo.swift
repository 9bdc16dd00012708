// What the samples use of Apple's Core Video, declared as Apple documents it, and working on a plain piece of memory.
// Rows are padded, and an address is given only while the buffer is locked, so that a sample that relies on either does not pass.

public typealias OSType = UInt32
public typealias CVReturn = Int32
public typealias CVOptionFlags = UInt64
public typealias CVImageBuffer = CVBuffer
public typealias CVPixelBuffer = CVImageBuffer
public final class CFAllocator {}
public final class CFDictionary {}

public let kCVReturnSuccess: CVReturn = 0
public let kCVPixelFormatType_OneComponent8: OSType = 0x4C30_3038  // L008
public let kCVPixelFormatType_32BGRA: OSType = 0x4247_5241  // BGRA

public struct CVPixelBufferLockFlags: OptionSet, Sendable {
    public let rawValue: CVOptionFlags
    public init(rawValue: CVOptionFlags) { self.rawValue = rawValue }
    public static let readOnly = CVPixelBufferLockFlags(rawValue: 1)
}

public final class CVBuffer {
    public let width: Int, height: Int, format: OSType, row: Int
    var locks = 0
    let memory: UnsafeMutableRawPointer

    init(_ width: Int, _ height: Int, _ format: OSType) {
        (self.width, self.height, self.format) = (width, height, format)
        row = (width * (format == kCVPixelFormatType_32BGRA ? 4 : 1) + 63) / 64 * 64
        memory = .allocate(byteCount: row * height, alignment: 64)
        memory.initializeMemory(as: UInt8.self, repeating: 0xAA, count: row * height)
    }
    deinit { memory.deallocate() }
}

@discardableResult
public func CVPixelBufferCreate(
    _ allocator: CFAllocator?, _ width: Int, _ height: Int, _ pixelFormatType: OSType, _ pixelBufferAttributes: CFDictionary?,
    _ pixelBufferOut: UnsafeMutablePointer<CVPixelBuffer?>
) -> CVReturn {
    pixelBufferOut.pointee = CVBuffer(width, height, pixelFormatType)
    return kCVReturnSuccess
}

@discardableResult
public func CVPixelBufferLockBaseAddress(_ pixelBuffer: CVPixelBuffer, _ lockFlags: CVPixelBufferLockFlags) -> CVReturn {
    pixelBuffer.locks += 1
    return kCVReturnSuccess
}

@discardableResult
public func CVPixelBufferUnlockBaseAddress(_ pixelBuffer: CVPixelBuffer, _ unlockFlags: CVPixelBufferLockFlags) -> CVReturn {
    pixelBuffer.locks -= 1
    return kCVReturnSuccess
}

public func CVPixelBufferGetBaseAddress(_ pixelBuffer: CVPixelBuffer) -> UnsafeMutableRawPointer? {
    pixelBuffer.locks > 0 ? pixelBuffer.memory : nil
}

public func CVPixelBufferGetBytesPerRow(_ pixelBuffer: CVPixelBuffer) -> Int { pixelBuffer.row }

extension CVBuffer {
    /// The pixels as a model sees them, grey or red, green, blue; only of a buffer that its maker has unlocked.
    public func pixels() -> [UInt8] {
        precondition(locks == 0, "the buffer is still locked")
        return (0..<height).flatMap { y in
            (0..<width).flatMap { x in
                format == kCVPixelFormatType_32BGRA ? (0..<3).map { byte(y, 4 * x + 2 - $0) } : [byte(y, x)]
            }
        }
    }

    private func byte(_ y: Int, _ at: Int) -> UInt8 { memory.load(fromByteOffset: y * row + at, as: UInt8.self) }
}
