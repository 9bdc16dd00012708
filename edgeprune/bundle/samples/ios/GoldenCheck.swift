// Runs the golden samples of this bundle through its Core ML model, on the device the app runs on. edgeprune's tests compile it on Linux,
// against declarations of Core ML and Core Video, and run it with a stand-in for the model. Never built by Xcode, nor run with Core ML.
// Add the .mlpackage, labels.txt, preprocess.json and golden/ to the app, then: print(try GoldenCheck(bundle: .main).run())
import CoreML
import CoreVideo
import Foundation

struct GoldenCheck {
    struct Recipe: Decodable {
        struct Tensor: Decodable { let name: String; let shape: [Int] }
        let input: Tensor, output: Tensor
    }
    struct Limits: Decodable {
        struct Tolerance: Decodable { let min_argmax_agreement: Double }
        let max_abs_error: Float, tolerance: Tolerance
    }
    struct Failure: Error { let text: String }
    let model: MLModel, labels: [String], recipe: Recipe, bundle: Bundle

    /// `units` are the processors that Core ML may use; `.cpuAndNeuralEngine` keeps the GPU free for the screen.
    init(bundle: Bundle, name: String = "Classifier", units: MLComputeUnits = .all) throws {
        guard let url = bundle.url(forResource: name, withExtension: "mlmodelc") else {
            throw Failure(text: "\(name).mlmodelc is not in the app; add the .mlpackage to its target")
        }
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        self.bundle = bundle
        model = try MLModel(contentsOf: url, configuration: configuration)
        labels = String(decoding: try GoldenCheck.data(bundle, "labels", "txt"), as: UTF8.self).split(separator: "\n").map(String.init)
        recipe = try JSONDecoder().decode(Recipe.self, from: try GoldenCheck.data(bundle, "preprocess", "json"))
    }

    /// One line: PASS or FAIL, the largest error, and the share of samples with the golden class.
    func run() throws -> String {
        let limits = try JSONDecoder().decode(Limits.self, from: try GoldenCheck.data(bundle, "tolerance", "json"))
        let inputs = try GoldenCheck.array(bundle, "inputs"), outputs = try GoldenCheck.array(bundle, "outputs")
        let golden: [Float] = outputs.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        let count = golden.count / labels.count, size = inputs.count / count
        var worst: Float = 0, same = 0
        for i in 0..<count {
            let answer = try logits(for: inputs.subdata(in: i * size..<(i + 1) * size))
            let wanted = Array(golden[i * labels.count..<(i + 1) * labels.count])
            for (a, b) in zip(answer, wanted) { worst = max(worst, a.isFinite ? abs(a - b) : .infinity) }
            same += best(answer) == best(wanted) ? 1 : 0
        }
        let ok = worst <= limits.max_abs_error * 1.001 && Double(same) / Double(count) >= limits.tolerance.min_argmax_agreement
        return "\(ok ? "PASS" : "FAIL"): largest error \(worst), same class \(same) of \(count)"
    }

    /// The answers for one raw sample: the bytes of an image (grey or RGB, row by row), or of float32 values where the model takes those.
    func logits(for raw: Data) throws -> [Float] {
        let isImage = model.modelDescription.inputDescriptionsByName[recipe.input.name]?.type == .image
        let value = try isImage ? image(raw) : tensor(raw)
        let features = try MLDictionaryFeatureProvider(dictionary: [recipe.input.name: value])
        guard let found = try model.prediction(from: features).featureValue(for: recipe.output.name)?.multiArrayValue
        else { throw Failure(text: "the model has no output \(recipe.output.name)") }
        return (0..<found.count).map { found[$0].floatValue }
    }

    private func best(_ values: [Float]) -> Int { values.indices.max { values[$0] < values[$1] }! }

    private func image(_ raw: Data) throws -> MLFeatureValue {
        let channels = recipe.input.shape[1], height = recipe.input.shape[2], width = recipe.input.shape[3]
        let format = channels == 1 ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
        var made: CVPixelBuffer?
        CVPixelBufferCreate(nil, width, height, format, nil, &made)
        guard let buffer = made, raw.count == width * height * channels else { throw Failure(text: "a wrong image size") }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        let pixels = CVPixelBufferGetBaseAddress(buffer)!.assumingMemoryBound(to: UInt8.self)
        let row = CVPixelBufferGetBytesPerRow(buffer), bytes = [UInt8](raw)
        for y in 0..<height { for x in 0..<width {
            let from = (y * width + x) * channels
            if channels == 1 { pixels[y * row + x] = bytes[from]; continue }
            for c in 0..<3 { pixels[y * row + 4 * x + c] = bytes[from + 2 - c] }  // the buffer is blue, green, red
            pixels[y * row + 4 * x + 3] = 255
        } }
        return MLFeatureValue(pixelBuffer: buffer)
    }

    private func tensor(_ raw: Data) throws -> MLFeatureValue {
        let array = try MLMultiArray(shape: recipe.input.shape.map { NSNumber(value: $0) }, dataType: .float32)
        let values = raw.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        guard values.count == array.count else { throw Failure(text: "a wrong sample size") }
        for (i, value) in values.enumerated() { array[i] = NSNumber(value: value) }
        return MLFeatureValue(multiArray: array)
    }

    private static func data(_ bundle: Bundle, _ name: String, _ kind: String) throws -> Data {
        guard let url = bundle.url(forResource: name, withExtension: kind) ?? bundle.url(
            forResource: name, withExtension: kind, subdirectory: "golden") else { throw Failure(text: "\(name).\(kind) is missing") }
        return try Data(contentsOf: url)
    }

    /// The values of a version 1 .npy file: ten bytes with the length of the header, the header, then the values row by row.
    private static func array(_ bundle: Bundle, _ name: String) throws -> Data {
        let content = [UInt8](try data(bundle, name, "npy"))
        return Data(content[(10 + Int(content[8]) + 256 * Int(content[9]))...])
    }
}
